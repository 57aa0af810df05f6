"""Manifests: which utterances a split has and what their labels are, as a TSV that people can read and diff."""
