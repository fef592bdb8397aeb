"""What K-FAC sees of a model, and how good it is there: reports that change nothing."""
