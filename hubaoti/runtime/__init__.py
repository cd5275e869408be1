"""Artifact → running code: open a graph, bind its constants by reference, call it with checks."""
