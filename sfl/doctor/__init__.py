"""`sfl doctor`: whether this machine, and the way to its servers, are as a daemon needs them."""
