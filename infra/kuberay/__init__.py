"""Kubernetes objects: Ray clusters and jobs for the KubeRay operator, the tracking server, and who may talk to whom."""
