"""The page that ``betaclip train`` and ``betaclip report`` write about a run."""
