import Foundation

/// The processor that this process runs on.
public enum Processor {
    /// Its kind, in the words of golden vectors (edgellama/targets/families.py).
    ///
    /// Apple's processors have products of int8 since the A13. The A12 of the iPhone XS has none.
    public static var kind: String {
        #if arch(x86_64)
        return "x86-64"
        #elseif canImport(Darwin)
        var found: Int32 = 0
        var size: Int = MemoryLayout<Int32>.size
        let status: Int32 = sysctlbyname("hw.optional.arm.FEAT_DotProd", &found, &size, nil, 0)
        return status == 0 && found == 1 ? "arm64-dotprod" : "arm64"
        #else
        return "arm64-dotprod"
        #endif
    }
}
