"""What is not the method: offered by one script, never needed by the others."""
