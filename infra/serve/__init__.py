"""The verb serve: a page for a person with an image, on this machine."""
