import XCTest

@testable import EdgeLlamaCore

/// What the Core ML runtime computes itself; the model is only on Apple's systems.
final class CoreMLInterfaceTests: XCTestCase {
    func testTheMaskLetsATokenLookBackAndAtItself() {
        func text(_ bits: [UInt16], _ width: Int) -> [String] {
            stride(from: 0, to: bits.count, by: width).map { (start: Int) -> String in
                bits[start..<start + width].map { $0 == 0 ? "0" : ($0 == 0xfc00 ? "-" : "?") }.joined()
            }
        }
        // Flexible: E = position + T. Static: E = context. Cache as an input: E = context + T.
        XCTAssertEqual(
            text(CoreMLInterface.causalMask(rows: 3, width: 5, position: 2, own: 2), 5), ["000--", "0000-", "00000"]
        )
        XCTAssertEqual(
            text(CoreMLInterface.causalMask(rows: 2, width: 6, position: 3, own: 3), 6), ["0000--", "00000-"]
        )
        XCTAssertEqual(
            text(CoreMLInterface.causalMask(rows: 2, width: 8, position: 2, own: 6), 8), ["00----0-", "00----00"]
        )
        XCTAssertEqual(text(CoreMLInterface.causalMask(rows: 1, width: 1, position: 0, own: 0), 1), ["0"])
    }

    func testCallsOfAFlexibleFunction() {
        let calls: [CoreMLCall] = CoreMLCall.plan(count: 600, position: 5, contextLength: 2048, prefillTokens: nil)
        XCTAssertEqual(calls.map { $0.count }, [256, 256, 88])
        XCTAssertEqual(calls.map { $0.position }, [5, 261, 517])
        XCTAssertEqual(calls.map { $0.rows }, [256, 256, 88])
    }

    func testCallsOfStaticFunctions() {
        let calls: [CoreMLCall] = CoreMLCall.plan(count: 40, position: 0, contextLength: 64, prefillTokens: 32)
        XCTAssertEqual(calls.map { $0.count }, [32, 8])
        XCTAssertEqual(calls.map { $0.rows }, [32, 32])
        // At the end of the context a padded call would write past it.
        let end: [CoreMLCall] = CoreMLCall.plan(count: 4, position: 40, contextLength: 64, prefillTokens: 32)
        XCTAssertEqual(end.map { $0.count }, [1, 1, 1, 1])
        XCTAssertEqual(end.map { $0.isPrefill }, [false, false, false, false])
        let one: [CoreMLCall] = CoreMLCall.plan(count: 1, position: 0, contextLength: 64, prefillTokens: 32)
        XCTAssertEqual(one, [CoreMLCall(position: 0, count: 1, rows: 1, isPrefill: false)])
    }

    func testEveryFloat16IsRead() {
        let known: [UInt16: Float] = [
            0x0000: 0, 0x3c00: 1, 0xc000: -2, 0x7bff: 65504, 0x0400: 0x1p-14, 0x0001: 0x1p-24, 0x03ff: 0x3ffp-24,
            0x7c00: .infinity, 0xfc00: -.infinity, 0x3555: 0.333251953125,
        ]
        for (bits, value) in known { XCTAssertEqual(CoreMLInterface.float(bits), value) }
        XCTAssertEqual(CoreMLInterface.float(0x8000).sign, .minus)
        XCTAssertTrue(CoreMLInterface.float(0x7e01).isNaN)
        #if !((os(macOS) || targetEnvironment(macCatalyst)) && arch(x86_64))
        for bits in UInt16.min...UInt16.max {
            let expected: Float = Float(Float16(bitPattern: bits))
            let found: Float = CoreMLInterface.float(bits)
            XCTAssertTrue(found == expected || (found.isNaN && expected.isNaN), "\(bits)")
        }
        #endif
    }
}
