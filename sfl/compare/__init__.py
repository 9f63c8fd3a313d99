"""`sfl compare`: strategies, merges and seeds on one data set, beside centralised training, in one process."""
