"""`unilatent demo`: a page in a browser that samples, reconstructs, interpolates and explains one model.

`workbench` does the work without a web framework, `markup` turns results into HTML, `page` is the page in Gradio, and
`server` serves it. Gradio is imported in the last two only.
"""
