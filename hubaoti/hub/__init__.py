"""The remote store: bundles pushed to Hub repos, artifacts pulled from them."""
