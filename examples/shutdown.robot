*** Settings ***
Documentation    Who closes first, asked from Robot Framework: robot examples/shutdown.robot
Library          TcpKeywords.py
Test Setup       Start Watching
Test Teardown    Stop Watching

*** Test Cases ***
The Client Closes First
    Start Server
    Say    hello
    Stop Server
    Should Be Closed First By    client
    Nothing Should Be Left Open
    Port Should Be Free
