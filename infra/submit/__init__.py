"""Any verb on a cluster: what travels, where it goes, how it is followed."""
