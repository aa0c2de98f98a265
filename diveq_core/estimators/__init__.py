"""The estimators: what stands for the derivative of the choice of a codeword."""
