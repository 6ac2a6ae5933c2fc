"""What the cookbooks share. Notebooks run in `cookbooks/`, where `from utils... import` finds it.

model                the back end that the variable MODEL names
agent_function_call  the tools `computer_use` and `mobile_use`: schemas, and calls read into actions
screen               a page in headless Chromium without network: looked at, acted on
miniwob              MiniWoB's tasks as such pages, which count success themselves
agent                observe, act, check: the loop with its limits
looking              tools to think with: a zoom into the picture, a search in local texts
multimodal_coding    code that a model wrote: screenshots of pages, programs in a locked-down process
making               pictures and documents that the notebooks ask about, with the truth about them
show                 pictures side by side
"""
