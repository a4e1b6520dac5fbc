"""An older name of `helpers.pipelines`."""

from helpers.loading.sizes import parts as parts
