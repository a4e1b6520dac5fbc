"""The storybook world: scenes that can be drawn, described, read back and judged."""
