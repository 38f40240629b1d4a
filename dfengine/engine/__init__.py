"""Running a loaded model. `modules` runs the plain torch modules and defines what is correct."""
