"""What a step computes: the method's contract, the methods, the dictionary and its matches, the losses. Nothing here
reads a file, knows a run's folder or draws a picture."""
