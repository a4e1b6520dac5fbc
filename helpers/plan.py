"""An older name of `helpers.memory`."""

from helpers.loading.plan import WITHOUT_T5 as WITHOUT_T5
from helpers.loading.plan import plans as plans
