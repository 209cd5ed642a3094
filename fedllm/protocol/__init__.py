"""What travels between the server and the sites.

`enrolment` has the documents that people carry once; `link` the frames of the connection; `sealed_envelope` what is
inside them; `messages` the requests and answers; `spending_statement` what a site signs with every answer.
"""
