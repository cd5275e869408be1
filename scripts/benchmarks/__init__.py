"""The figures of `scripts/bench`: one module for each thing that is measured, over the product."""
