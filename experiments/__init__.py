"""Programs on top of the method: `python mlo_mae.py NAME ...` runs NAME.py of this folder, as `-m experiments.NAME` does."""
