package org.pytorch.executorch;

public abstract class Tensor {
    protected Tensor() {}

    public static Tensor fromBlob(long[] data, long[] shape) {
        throw new UnsupportedOperationException();
    }

    public float[] getDataAsFloatArray() {
        throw new UnsupportedOperationException();
    }
}
