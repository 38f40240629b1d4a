"""Reading images and data sets, and making synthetic ones."""
