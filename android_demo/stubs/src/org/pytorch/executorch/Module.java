package org.pytorch.executorch;

/** Signatures that the app is compiled against where the AAR is not at hand; never packed. */
public class Module {
    public static final int LOAD_MODE_MMAP = 1;

    protected Module() {}

    public static Module load(String modelPath, int loadMode) {
        throw new UnsupportedOperationException();
    }

    public EValue[] execute(String methodName, EValue... inputs) {
        throw new UnsupportedOperationException();
    }

    public void destroy() {
        throw new UnsupportedOperationException();
    }
}
