// swift-tools-version: 5.9
import PackageDescription

let strict: [SwiftSetting] = [.enableExperimentalFeature("StrictConcurrency")]

let package = Package(
    name: "EdgeLlamaCore",
    platforms: [.iOS("18.0"), .macOS("15.0")],
    products: [.library(name: "EdgeLlamaCore", targets: ["EdgeLlamaCore"])],
    targets: [
        .target(name: "EdgeLlamaCore", swiftSettings: strict),
        .testTarget(name: "EdgeLlamaCoreTests", dependencies: ["EdgeLlamaCore"], swiftSettings: strict),
    ]
)
