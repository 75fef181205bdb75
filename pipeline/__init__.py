"""The data and training pipeline on Ray Data and Ray Train."""
