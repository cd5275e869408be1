"""Model → bundle: from config alone to a graph that was checked against eager."""
