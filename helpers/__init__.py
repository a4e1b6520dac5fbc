"""What the notebooks share: login, memory, pipelines, generate, images and the panel."""
