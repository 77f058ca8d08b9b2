// Signatures of ExecuTorch's Swift package that ios_demo calls, for a compiler that has none: it checks names and types.
// Nothing here runs, and nothing here is part of the app. As extension/apple/ExecuTorch/Exported of pytorch/executorch
// declares them.
import Foundation

public enum ModuleLoadMode: Int { case file, mmap, mmapUseMlock, mmapUseMlockIgnoreErrors }

public enum DataType: Int8 { case byte, char, short, int, long, half, float, double, bool, undefined }

public enum ShapeDynamism: UInt8 { case `static`, dynamicBound, dynamicUnbound }

public protocol Scalar { static var dataType: DataType { get } }

extension Int32: Scalar { public static var dataType: DataType { .int } }
extension Int64: Scalar { public static var dataType: DataType { .long } }
extension Float: Scalar { public static var dataType: DataType { .float } }

public protocol ValueConvertible { func asValue() -> Value }

public protocol ValueConstructible { static func from(_ value: Value) throws -> Self }

public protocol ValueSequenceConstructible { static func from(_ values: [Value]) throws -> Self }

public final class Value: ValueConvertible, ValueConstructible, ValueSequenceConstructible {
    public var scalar: NSNumber? { fatalError() }
    public var anyTensor: AnyTensor? { fatalError() }
    public func tensor<T: Scalar>() -> Tensor<T>? { fatalError() }
    public func asValue() -> Value { fatalError() }
    public static func from(_ value: Value) throws -> Value { fatalError() }
    public static func from(_ values: [Value]) throws -> Value { fatalError() }
}

extension Array: ValueSequenceConstructible where Element: ValueConstructible {
    public static func from(_ values: [Value]) throws -> [Element] { fatalError() }
}

public final class AnyTensor: ValueConvertible {
    public init(
        bytes pointer: UnsafeRawPointer, shape: [Int], strides: [Int] = [], dimensionOrder: [Int] = [],
        dataType: DataType, shapeDynamism: ShapeDynamism = .dynamicBound
    ) { fatalError() }
    public var dataType: DataType { fatalError() }
    public var shape: [Int] { fatalError() }
    public var count: Int { fatalError() }
    public func bytes(_ handler: (UnsafeRawPointer, Int, DataType) -> Void) { fatalError() }
    public func asValue() -> Value { fatalError() }
}

public final class Tensor<T: Scalar>: ValueConvertible {
    public init(
        _ scalars: [T], shape: [Int] = [], strides: [Int] = [], dimensionOrder: [Int] = [],
        shapeDynamism: ShapeDynamism = .dynamicBound
    ) { fatalError() }
    public convenience init(
        _ scalars: inout [T], shape: [Int] = [], strides: [Int] = [], dimensionOrder: [Int] = [],
        shapeDynamism: ShapeDynamism = .dynamicBound
    ) { fatalError() }
    public var count: Int { fatalError() }
    public func scalars() -> [T] { fatalError() }
    public func asValue() -> Value { fatalError() }
}

public final class TensorMetadata { public var shape: [Int] { fatalError() } }

public final class MethodMetadata {
    public var inputTensorMetadata: [Int: TensorMetadata] { fatalError() }
    public var outputTensorMetadata: [Int: TensorMetadata] { fatalError() }
}

public final class Module {
    public init(filePath: String, loadMode: ModuleLoadMode) { fatalError() }
    public func load(_ method: String) throws { fatalError() }
    public func methodMetadata(_ method: String) throws -> MethodMetadata { fatalError() }
    public func execute(_ method: String) throws -> [Value] { fatalError() }
    public func execute(_ method: String, _ inputs: [ValueConvertible]) throws -> [Value] { fatalError() }
    public func execute(_ method: String, _ inputs: ValueConvertible...) throws -> [Value] { fatalError() }
    public func execute<Output: ValueSequenceConstructible>(
        _ method: String, _ inputs: [ValueConvertible]
    ) throws -> Output { fatalError() }
}
