"""Networks, likelihoods and distributions that programs share."""
