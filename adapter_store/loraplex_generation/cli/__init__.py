"""`loraplex zoo` and `loraplex generator`: how the generators are trained."""
