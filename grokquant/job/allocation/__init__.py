"""A budget of bits: what each grid costs each matrix, and the best choice within the budget."""
