"""Metrics, the alarm threshold, and a baseline to compare with (DESIGN section 3, "Metrics").

The modules are imported one by one (`from dfengine.evaluation.calibration import Calibration`), so that loading a
detector does not load scikit-learn and matplotlib.
"""
