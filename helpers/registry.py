"""An older name of `helpers.pipelines`."""

from helpers.loading.registry import find as find
