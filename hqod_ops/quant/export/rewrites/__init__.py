"""Changes of a finished graph that leave its values as they are, one file each."""
