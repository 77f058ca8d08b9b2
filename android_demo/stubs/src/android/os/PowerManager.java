package android.os;

/** What is newer than the android.jar that the app is compiled against without an SDK; checked against API 36. */
public final class PowerManager {
    private PowerManager() {}

    public int getCurrentThermalStatus() {
        throw new UnsupportedOperationException();
    }
}
