"""Analysis of frozen networks: features, nearest neighbours, probes, metrics, and the matches of a run."""
