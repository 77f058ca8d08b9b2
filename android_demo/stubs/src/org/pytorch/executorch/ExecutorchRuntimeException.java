package org.pytorch.executorch;

public class ExecutorchRuntimeException extends RuntimeException {
    public ExecutorchRuntimeException(int errorCode, String details) {
        throw new UnsupportedOperationException();
    }

    public int getErrorCode() {
        throw new UnsupportedOperationException();
    }
}
