"""Second opinions for ``make audit``: tools that nobody of this project wrote read what is deployed.

cfn-lint reads the template as CloudFormation gets it and as the services get it, parliament reads every policy,
asl-validator the state machines, and JSONata's own implementation evaluates their expressions. Before a tool's silence
counts, it must find a fault that is put into its input: a tool that did not look finds nothing either.
"""
