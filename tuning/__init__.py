"""The search on Ray Tune, tracking and registry on MLflow, and the reports."""
