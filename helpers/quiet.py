"""An older name of `helpers.pipelines`."""

from helpers.loading.versions import no_bars as no_bars
