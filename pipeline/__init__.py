"""The data and training pipeline on Ray Data and Ray Train."""

from pipeline import environment as environment  # before anything imports ray
