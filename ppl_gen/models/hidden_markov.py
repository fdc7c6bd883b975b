def hidden_markov(): pass
