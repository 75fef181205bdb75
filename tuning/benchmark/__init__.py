"""The benchmark: methods compared on equal terms, as a grid on Ray Tune."""
