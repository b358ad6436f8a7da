"""What is known of detector libraries, one file a library; imported when one's model is met."""
