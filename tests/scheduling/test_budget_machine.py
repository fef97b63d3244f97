"""Random sequences of operations on layers with a budget: it holds after each, and attention reads what is held."""

from budget_machine import BudgetMachine
from hypothesis import settings

BudgetMachine.TestCase.settings = settings(max_examples=20, stateful_step_count=20)
TestBudgetMachine = BudgetMachine.TestCase
