"""The method: single-positive multi-label learning with MPC on torch and timm. Imports nothing by itself."""
