package org.pytorch.executorch;

public class EValue {
    protected EValue() {}

    public static EValue from(Tensor value) {
        throw new UnsupportedOperationException();
    }

    public Tensor toTensor() {
        throw new UnsupportedOperationException();
    }

    public long toInt() {
        throw new UnsupportedOperationException();
    }
}
