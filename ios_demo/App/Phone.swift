import EdgeLlamaCore
import Foundation

#if canImport(UIKit)
import UIKit
#endif

/// What the device says about itself.
enum Phone {
    /// The model identifier, such as iPhone17,1: the marketing name is not to be had.
    static var device: Device {
        var name: String = "Apple device"
        #if canImport(Darwin)
        var info: utsname = utsname()
        uname(&info)
        name = withUnsafeBytes(of: &info.machine) { (bytes: UnsafeRawBufferPointer) -> String in
            String(decoding: bytes.prefix { $0 != 0 }, as: UTF8.self)
        }
        #endif
        if let simulated: String = ProcessInfo.processInfo.environment["SIMULATOR_MODEL_IDENTIFIER"] {
            name = "Simulator of \(simulated)"
        }
        let version: OperatingSystemVersion = ProcessInfo.processInfo.operatingSystemVersion
        let os: String = "iOS \(version.majorVersion).\(version.minorVersion).\(version.patchVersion)"
        return Device(name: name, os: os)
    }

    /// Bytes that the system charged this process with, at most so far; nil where it does not tell.
    static var peakBytes: Int? { footprint()?.peak }

    /// Bytes that the system charges this process with.
    static var usedBytes: Int? { footprint()?.now }

    private static func footprint() -> (now: Int, peak: Int)? {
        #if canImport(Darwin)
        var info: task_vm_info_data_t = task_vm_info_data_t()
        let size: Int = MemoryLayout<task_vm_info_data_t>.size / MemoryLayout<integer_t>.size
        var count: mach_msg_type_number_t = mach_msg_type_number_t(size)
        let status: kern_return_t = withUnsafeMutablePointer(to: &info) { (pointer: UnsafeMutablePointer<task_vm_info_data_t>) in
            pointer.withMemoryRebound(to: integer_t.self, capacity: size) { (raw: UnsafeMutablePointer<integer_t>) in
                task_info(mach_task_self_, task_flavor_t(TASK_VM_INFO), raw, &count)
            }
        }
        if status != KERN_SUCCESS { return nil }
        return (Int(info.phys_footprint), Int(info.ledger_phys_footprint_peak))
        #else
        return nil
        #endif
    }

    /// How hot the device is.
    static var thermalState: String {
        #if canImport(Darwin)
        switch ProcessInfo.processInfo.thermalState {
        case .nominal: return "nominal"
        case .fair: return "fair"
        case .serious: return "serious"
        case .critical: return "critical"
        @unknown default: return "unknown"
        }
        #else
        return "unknown"
        #endif
    }

    /// While a model runs, a screen that goes dark would end it.
    @MainActor
    static func keepAwake(_ awake: Bool) {
        #if canImport(UIKit)
        UIApplication.shared.isIdleTimerDisabled = awake
        #endif
    }
}

func megabytes(_ bytes: Int?) -> String {
    guard let bytes: Int = bytes else { return "unknown" }
    return "\(bytes / 1_000_000) MB"
}

func perSecond(_ rate: Double?) -> String {
    guard let rate: Double = rate else { return "–" }
    return String(format: "%.1f tok/s", rate)
}

/// A message for a person from any error.
func sentence(_ error: any Error) -> String {
    if let own: EdgeLlamaError = error as? EdgeLlamaError { return own.text }
    return "A file cannot be read or written (\(error.localizedDescription)).\nCheck the free space of the device."
}
