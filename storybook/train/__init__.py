"""Training of everything in `models/`, from renders alone. `python -m storybook.train` runs it all."""
