// Signatures of Apple's Core ML that ios_demo calls, for a compiler that has no Core ML: it checks names and types.
// Nothing here runs, and nothing here is part of the app. Of the iOS 18 SDK, as its documentation gives them.
import Foundation

public enum MLComputeUnits: Int, Sendable { case cpuOnly, cpuAndGPU, all, cpuAndNeuralEngine }

public enum MLMultiArrayDataType: Int, Sendable { case double, float32, float16, int32 }

public struct MLModelMetadataKey: Hashable, Sendable {
    public static let creatorDefinedKey: MLModelMetadataKey = MLModelMetadataKey()
}

public final class MLModelConfiguration {
    public var computeUnits: MLComputeUnits = .all
    public var functionName: String?
    public init() {}
}

public final class MLState {}

public final class MLMultiArray {
    public init(shape: [NSNumber], dataType: MLMultiArrayDataType) throws { fatalError() }
    public var shape: [NSNumber] { fatalError() }
    public var strides: [NSNumber] { fatalError() }
    public var dataType: MLMultiArrayDataType { fatalError() }
    public func withUnsafeBytes<R>(_ body: (UnsafeRawBufferPointer) throws -> R) rethrows -> R { fatalError() }
    public func withUnsafeMutableBytes<R>(_ body: (UnsafeMutableRawBufferPointer, [Int]) throws -> R) rethrows -> R {
        fatalError()
    }
}

public final class MLFeatureValue {
    public init(multiArray: MLMultiArray) { fatalError() }
    public var multiArrayValue: MLMultiArray? { fatalError() }
}

public protocol MLFeatureProvider: AnyObject {
    func featureValue(for featureName: String) -> MLFeatureValue?
}

public final class MLDictionaryFeatureProvider: MLFeatureProvider {
    public init(dictionary: [String: Any]) throws { fatalError() }
    public func featureValue(for featureName: String) -> MLFeatureValue? { fatalError() }
}

public final class MLMultiArrayConstraint {
    public var shape: [NSNumber] { fatalError() }
}

public final class MLFeatureDescription {
    public var multiArrayConstraint: MLMultiArrayConstraint? { fatalError() }
}

public final class MLModelDescription {
    public var metadata: [MLModelMetadataKey: Any] { fatalError() }
    public var inputDescriptionsByName: [String: MLFeatureDescription] { fatalError() }
    public var stateDescriptionsByName: [String: MLFeatureDescription] { fatalError() }
}

public final class MLModelAsset {
    public init(url: URL) throws { fatalError() }
    public var functionNames: [String] { get async throws { fatalError() } }
}

public final class MLModel {
    public class func compileModel(at url: URL) async throws -> URL { fatalError() }
    public class func load(contentsOf url: URL, configuration: MLModelConfiguration) async throws -> MLModel {
        fatalError()
    }
    public var modelDescription: MLModelDescription { fatalError() }
    public func makeState() -> MLState { fatalError() }
    public func prediction(from input: any MLFeatureProvider, using state: MLState) throws -> any MLFeatureProvider {
        fatalError()
    }
    public func prediction(
        from input: any MLFeatureProvider, using state: MLState
    ) async throws -> any MLFeatureProvider { fatalError() }
}
