"""A fleet as one file describes it, for the embedded launcher and for Ray alike."""
